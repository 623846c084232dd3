"""The null model: what it is fitted from, how, what it answers, and the file it is kept in."""
