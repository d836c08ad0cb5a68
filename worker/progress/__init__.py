"""Progress webhooks and previews: lossy."""
