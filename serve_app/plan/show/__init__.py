"""A plan at the terminal: tables with rich, JSON, CSV. Everything comes from an `Answer`; nothing is reckoned here."""
