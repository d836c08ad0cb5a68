"""Traces of jobs: the context in messages and webhooks, and OpenTelemetry's spans where they are switched on."""
