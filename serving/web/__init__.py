"""Texts and HTML of the web page."""
