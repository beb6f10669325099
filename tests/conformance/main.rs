//! One suite for every backend: cases named by what they assert, against a plain reference model.
//!
//! `cargo test` runs a pairwise cover of the product; `cargo xtask conformance --backend NAME --world N`
//! runs all of it. A new backend gets the suite by one line of `suites!`.

mod cases;
mod model;
mod plain_backend;
mod product;
mod programs;
mod suite;

use suite::suites;

suites! {
    native_threads: "native", worlds [1, 2, 3, 4, 5, 8], failures: true;
    plain: "plain", worlds [1, 2, 3], failures: false;
}
