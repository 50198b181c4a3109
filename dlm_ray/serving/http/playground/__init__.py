"""The playground: a page that shows a text while it is denoised, in plain HTML, CSS and JavaScript."""
