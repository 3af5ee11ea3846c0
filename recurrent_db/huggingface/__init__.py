"""Export to and import from folders of Hugging Face transformers."""
