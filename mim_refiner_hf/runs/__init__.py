"""A run from recipe to evidence: prepare, plan, choose heads, train, measure, report."""
