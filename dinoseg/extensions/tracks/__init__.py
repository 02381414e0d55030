"""Scores of tracks: HOTA and track AP of files in the formats of MOTS and YouTube-VIS."""
