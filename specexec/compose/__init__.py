"""The composition root: names, placement, target, drafter and loop become one Engine. Only here is offload known."""
