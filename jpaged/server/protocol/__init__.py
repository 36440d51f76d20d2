"""The bodies of requests and responses: OpenAI's fields, and those that vLLM adds."""
