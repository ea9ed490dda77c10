"""Builds the package. Everything declarative is in pyproject.toml; compiled extensions are declared here."""

from setuptools import setup

setup()
