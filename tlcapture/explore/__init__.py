"""The Python API: experiments, saved and live captures, frames, figures, the IPython extension."""
