"""Where models come from: names, the Hub, the local cache. Reads headers and documents, loads no weights."""
