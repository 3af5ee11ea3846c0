"""To and from folders of Hugging Face transformers."""
