"""STAR's router: dispatch, rescheduling and an unbroken stream in front of SGLang instances."""
