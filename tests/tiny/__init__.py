"""Parts of the tiny pipelines: text components and the fit of the last layers."""
