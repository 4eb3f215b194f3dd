"""Commands that measure and compare: bench, check, eval. Nothing else imports them."""
