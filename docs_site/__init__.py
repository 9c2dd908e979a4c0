"""The pages of the documentation site that are generated, and the links between pages."""
