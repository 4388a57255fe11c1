"""What the tests share: each helper once, for all of them."""
