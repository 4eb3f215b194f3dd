"""The machine: memory, disks, threads, and what the operating system allows. Knows no model and no checkpoint."""
