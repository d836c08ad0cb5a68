"""Results: images, their records, webhooks, and the outbox of those not yet delivered."""
