"""Commands about models and machines: what is here, what would fit, downloads, packs. They generate no text."""
