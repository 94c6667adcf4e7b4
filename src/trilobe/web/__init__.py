"""The pages people look at, drawn from nouns and plain values; this room runs no verb and opens no store."""
