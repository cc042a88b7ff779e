"""What `compare` compares: the chosen captures, their unembeddings, and the summary."""
