"""The worker's three webhooks; its BACKEND_API_URL ends before `/api`."""

from django.urls import path

from gallery import webhooks

urlpatterns = [
    path("api/webhooks/inference/progress", webhooks.progress),
    path("api/webhooks/inference/complete", webhooks.complete),
    path("api/webhooks/inference/failed", webhooks.failed),
]
