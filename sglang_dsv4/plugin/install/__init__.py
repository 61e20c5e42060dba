"""Puts our pool, backend and portable operations in SGLang's places."""
