"""Two captures on the same tokens: how their projections, residuals and next-token distributions differ."""
