//! What every method promises, on a dense and on a quantised base. A new method is one row in `table`.
