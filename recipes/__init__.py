"""Training recipes, run from the root of the repository; not a part of the installed package."""
