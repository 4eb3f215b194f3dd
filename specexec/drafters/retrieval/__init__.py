"""What has been written before, remembered by its endings."""
