"""What an exported folder runs with: files that are copied into it as they are, each importing nothing of this package."""
