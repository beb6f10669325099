//! Development tasks of tch-distributed.
fn main() {}
