//! One suite for every backend: cases named by what they assert, against a plain reference model.
//!
//! `cargo test` runs a pairwise cover of the product; `cargo xtask conformance --backend NAME --world N`
//! runs all of it. A new backend gets the suite by one line of `suites!`.

mod backends;
mod cases;
#[allow(dead_code)] // its `main`
#[path = "../../examples/custom_backend.rs"]
mod custom_backend;
mod model;
mod plain_backend;
mod product;
mod programs;
mod staged;
mod suite;
mod tables;
mod whole;

use suite::suites;

suites! {
    native: "native", threads [1, 2, 3, 4, 5, 8], processes [1, 2, 3, 4], failures true;
    native_tcp: "native-tcp", threads [1, 2, 3, 4], processes [4], failures true;
    native_hosts: "native-hosts", threads [3, 4, 5], processes [4], failures true;
    native_unix: "native-unix", threads [2, 5], processes [2], failures true;
    gloo: "gloo", threads [2, 3], processes [2], failures false;
    outside_the_crate: "compressing", threads [1, 3], processes [2], failures true;
    gloo_staged: "gloo-staged", threads [1, 2], failures false;
    plain: "plain", threads [1, 2, 3], processes [2], failures false;
}
