"""The page on which a text can be seen as it is denoised: plain HTML, CSS and JavaScript, served by the endpoint that it talks to."""
