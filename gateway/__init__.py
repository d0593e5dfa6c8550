"""The public doors: gRPC and OpenAI HTTP, text, validation."""
