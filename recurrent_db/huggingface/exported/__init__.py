"""The code that an exported folder runs with: files that are copied into it as they are. They import each other relatively,
and nothing of this package."""
