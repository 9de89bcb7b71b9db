"""A chain on disk or on the Hub: manifest, folders of anchors, cards; opened, checked, copied, pushed."""
