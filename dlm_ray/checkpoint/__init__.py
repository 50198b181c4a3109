"""tensorstore arrays, the commit, verification; Hugging Face folders in and out."""
