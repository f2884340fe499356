"""Image files in this host's locations: implements ports.Disks."""
