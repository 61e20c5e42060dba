"""Who owns which page, and which sequences exist."""
