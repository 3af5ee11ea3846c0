"""The code of an exported folder. These files are copied into it unchanged, so they use relative imports among themselves
and import nothing from this package."""
