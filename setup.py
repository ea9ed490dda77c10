"""Builds the package. Everything declarative is in pyproject.toml; the compiled engine will be built here."""

from setuptools import setup

setup()
