"""Connections to other packages. Each module needs the extra of its name; nothing else imports it."""
