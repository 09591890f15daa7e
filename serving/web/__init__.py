"""Texts and HTML of the web page; imports nothing from the other rooms."""
