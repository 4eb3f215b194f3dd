"""Where models come from: names, the Hub, the cache of this machine."""
