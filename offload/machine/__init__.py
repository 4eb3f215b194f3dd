"""The machine under us: memory, disks, threads, and what the operating system lets us do. Knows no model."""
