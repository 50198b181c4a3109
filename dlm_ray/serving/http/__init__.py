"""OpenAI's API over HTTP: application, middleware, protocol, responses, playground."""
