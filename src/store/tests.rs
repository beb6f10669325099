//! One list of cases, run for every store.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::*;

type Case = fn(&Arc<dyn Store>);

const SOON: Duration = Duration::from_millis(150);
const LONG: Duration = Duration::from_secs(30);

/// Instantiates the list for one store; `$also` is a second handle on the same keys.
macro_rules! suite {
    ($store:ident, $make:expr) => {
        mod $store {
            use super::*;
            cases! { $make;
                what_is_set_is_what_is_got,
                a_get_waits_for_the_key,
                a_get_of_a_key_that_never_comes_names_it,
                a_wait_wants_all_keys_and_names_them,
                a_check_does_not_wait,
                counters_are_decimal_text,
                adding_to_text_is_an_error_and_the_store_goes_on,
                counters_are_atomic,
                compare_set_is_pytorchs,
                one_of_many_wins_a_compare_set,
                deletes_say_whether_the_key_was_there,
                only_users_keys_are_counted,
                appends_are_atomic,
                values_are_bytes_of_any_length,
                a_waiting_get_keeps_no_other_thread_from_the_store,
                the_timeout_is_what_was_set,
            }
        }
    };
}

macro_rules! cases {
    ($make:expr; $($case:ident,)*) => { $(
        #[test]
        fn $case() {
            let (store, _guard) = $make();
            store.set_timeout(LONG);
            let case: Case = super::$case;
            case(&store);
        }
    )* };
}

type Made = (Arc<dyn Store>, Box<dyn std::any::Any>);

fn made(store: impl Store) -> Made {
    (Arc::new(store), Box::new(()))
}

fn file() -> Made {
    let dir = tempfile::tempdir().unwrap();
    (Arc::new(FileStore::new(dir.path().join("store")).unwrap()), Box::new(dir))
}

fn client() -> Made {
    let server = TcpStore::serve("localhost", 0).unwrap();
    (Arc::new(TcpStore::connect("localhost", server.port(), LONG).unwrap()), Box::new(server))
}

/// A client that joined as PyTorch's process groups join.
fn worker() -> Made {
    let (store, server) = client();
    server.downcast_ref::<TcpStore>().unwrap().wire().unwrap().join().unwrap();
    (store, server)
}

suite!(hash, || made(HashStore::new()));
suite!(prefix, || made(PrefixStore::new("0/", HashStore::new())));
suite!(served, || made(TcpStore::serve("127.0.0.1", 0).unwrap()));
suite!(connected, client);
suite!(joined, worker);
suite!(in_a_file, file);
suite!(prefix_of_a_connected, || {
    let (store, guard) = client();
    let store: Arc<dyn Store> = Arc::new(PrefixStore::new("job", store));
    (store, guard)
});

fn store_error(result: Result<impl std::fmt::Debug>) -> (String, String, String) {
    match result.unwrap_err() {
        Error::Store { op, key, reason } => (op, key, reason),
        other => panic!("not a store error: {other}"),
    }
}

fn what_is_set_is_what_is_got(store: &Arc<dyn Store>) {
    store.set("a", b"one").unwrap();
    store.set("b", b"two").unwrap();
    store.set("a", b"three").unwrap();
    assert_eq!(store.get("a").unwrap(), b"three");
    assert_eq!(store.get("b").unwrap(), b"two");
}

fn a_get_waits_for_the_key(store: &Arc<dyn Store>) {
    thread::scope(|scope| {
        let got = scope.spawn(|| store.get("late").unwrap());
        thread::sleep(Duration::from_millis(60));
        store.set("late", b"here").unwrap();
        assert_eq!(got.join().unwrap(), b"here");
    });
}

fn a_get_of_a_key_that_never_comes_names_it(store: &Arc<dyn Store>) {
    store.set_timeout(SOON);
    let started = Instant::now();
    let (op, key, reason) = store_error(store.get("never"));
    assert!(started.elapsed() >= SOON);
    assert_eq!(op, "get");
    assert!(key.ends_with("never") && reason.contains("150ms"), "{key}: {reason}");
    store.set_timeout(LONG);
    store.set("never", b"say never").unwrap();
    assert_eq!(store.get("never").unwrap(), b"say never");
}

fn a_wait_wants_all_keys_and_names_them(store: &Arc<dyn Store>) {
    store.set("x", b"").unwrap();
    store.wait(&["x"], LONG).unwrap();
    store.wait(&[], LONG).unwrap();
    let (op, key, _) = store_error(store.wait(&["x", "y"], SOON));
    assert_eq!(op, "wait");
    assert!(key.contains('x') && key.contains('y'), "{key}");
    store.set("y", b"").unwrap();
    store.wait(&["x", "y"], LONG).unwrap();
}

fn a_check_does_not_wait(store: &Arc<dyn Store>) {
    assert!(!store.check(&["a"]).unwrap());
    store.set("a", b"1").unwrap();
    assert!(store.check(&["a"]).unwrap());
    assert!(!store.check(&["a", "b"]).unwrap());
    store.set("b", b"1").unwrap();
    assert!(store.check(&["a", "b"]).unwrap());
}

fn counters_are_decimal_text(store: &Arc<dyn Store>) {
    assert_eq!(store.add("n", 40).unwrap(), 40);
    assert_eq!(store.add("n", 2).unwrap(), 42);
    assert_eq!(store.add("n", 0).unwrap(), 42);
    assert_eq!(store.add("n", -50).unwrap(), -8);
    assert_eq!(store.get("n").unwrap(), b"-8");
    store.set("n", b"7").unwrap();
    assert_eq!(store.add("n", 1).unwrap(), 8);
}

fn adding_to_text_is_an_error_and_the_store_goes_on(store: &Arc<dyn Store>) {
    store.set("text", b"blue").unwrap();
    let (op, key, reason) = store_error(store.add("text", 1));
    assert_eq!(op, "add");
    assert!(key.ends_with("text") && reason.contains("\"blue\" is not an integer"), "{reason}");
    assert_eq!(store.get("text").unwrap(), b"blue");
    assert_eq!(store.add("n", 1).unwrap(), 1);
}

fn counters_are_atomic(store: &Arc<dyn Store>) {
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..25).for_each(|_| assert!(store.add("n", 1).unwrap() > 0)));
        }
    });
    assert_eq!(store.add("n", 0).unwrap(), 100);
}

fn compare_set_is_pytorchs(store: &Arc<dyn Store>) {
    assert_eq!(store.compare_set("k", b"", b"new").unwrap(), b"new", "absent and nothing expected: set");
    assert_eq!(store.compare_set("k", b"new", b"newer").unwrap(), b"newer", "as expected: set");
    assert_eq!(store.compare_set("k", b"new", b"x").unwrap(), b"newer", "not as expected: the current value");
    assert_eq!(store.get("k").unwrap(), b"newer");
    assert_eq!(
        store.compare_set("absent", b"y", b"x").unwrap(),
        b"y",
        "absent but expected: what was expected"
    );
    assert!(!store.check(&["absent"]).unwrap());
}

fn one_of_many_wins_a_compare_set(store: &Arc<dyn Store>) {
    let seen: Vec<Vec<u8>> = thread::scope(|scope| {
        let threads: Vec<_> =
            (0..4u8).map(|i| scope.spawn(move || store.compare_set("k", b"", &[i]).unwrap())).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    let winner = store.get("k").unwrap();
    assert!(seen.iter().all(|value| *value == winner), "{seen:?} {winner:?}");
}

fn deletes_say_whether_the_key_was_there(store: &Arc<dyn Store>) {
    assert!(!store.delete("k").unwrap());
    store.set("k", b"1").unwrap();
    assert!(store.delete("k").unwrap());
    assert!(!store.delete("k").unwrap());
    assert!(!store.check(&["k"]).unwrap());
    store.set("k", b"2").unwrap();
    assert_eq!(store.get("k").unwrap(), b"2");
}

fn only_users_keys_are_counted(store: &Arc<dyn Store>) {
    assert_eq!(store.num_keys().unwrap(), 0);
    store.set("a", b"1").unwrap();
    store.set("a", b"2").unwrap();
    store.add("b", 1).unwrap();
    store.append("c", b"1").unwrap();
    assert_eq!(store.num_keys().unwrap(), 3);
    store.delete("a").unwrap();
    assert_eq!(store.num_keys().unwrap(), 2);
}

fn appends_are_atomic(store: &Arc<dyn Store>) {
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| (0..10).for_each(|_| store.append("log", b"ab").unwrap()));
        }
    });
    assert_eq!(store.get("log").unwrap(), b"ab".repeat(30));
}

fn values_are_bytes_of_any_length(store: &Arc<dyn Store>) {
    let long: Vec<u8> = (0..1_000_000u32).map(|i| (i % 251) as u8).collect();
    for value in [&b""[..], b"\0\xff\n", &long] {
        store.set("v", value).unwrap();
        assert_eq!(store.get("v").unwrap(), value);
    }
}

fn a_waiting_get_keeps_no_other_thread_from_the_store(store: &Arc<dyn Store>) {
    thread::scope(|scope| {
        let waiting = scope.spawn(|| store.get("last").unwrap());
        let too = scope.spawn(|| store.wait(&["first", "last"], LONG).unwrap());
        thread::sleep(Duration::from_millis(30));
        store.set("first", b"1").unwrap();
        assert_eq!(store.add("n", 1).unwrap(), 1);
        assert!(!store.check(&["last"]).unwrap());
        store.set("last", b"2").unwrap();
        assert_eq!(waiting.join().unwrap(), b"2");
        too.join().unwrap();
    });
}

fn the_timeout_is_what_was_set(store: &Arc<dyn Store>) {
    store.set_timeout(Duration::from_secs(7));
    assert_eq!(store.timeout(), Duration::from_secs(7));
}

#[test]
fn stores_wait_five_minutes_unless_told_otherwise() {
    let dir = tempfile::tempdir().unwrap();
    let server = TcpStore::serve("127.0.0.1", 0).unwrap();
    assert_eq!(HashStore::new().timeout(), DEFAULT_TIMEOUT);
    assert_eq!(server.timeout(), DEFAULT_TIMEOUT);
    assert_eq!(TcpStore::connect("127.0.0.1", server.port(), LONG).unwrap().timeout(), DEFAULT_TIMEOUT);
    assert_eq!(FileStore::new(dir.path().join("s")).unwrap().timeout(), DEFAULT_TIMEOUT);
}

#[test]
fn prefixes_nest_as_pytorch_nests_them() {
    let below = Arc::new(HashStore::new());
    let store =
        PrefixStore::new("cpu/", PrefixStore::new("0/", PrefixStore::new("default_pg", below.clone())));
    store.set("0/1", b"here").unwrap();
    assert_eq!(below.get("default_pg/0//cpu//0/1").unwrap(), b"here");
}

#[test]
fn a_port_in_use_is_an_error_at_once() {
    let first = TcpStore::serve("127.0.0.1", 0).unwrap();
    let (op, key, reason) = store_error(TcpStore::serve("127.0.0.1", first.port()));
    assert_eq!((op.as_str(), key), ("serve", format!("127.0.0.1:{}", first.port())));
    assert!(reason.contains("in use"), "{reason}");
}

#[test]
fn a_host_that_does_not_resolve_is_an_error_and_not_a_wait() {
    let (_, _, reason) = store_error(TcpStore::connect("no-such-host.invalid", 1, Duration::from_secs(1000)));
    assert!(reason.contains("does not resolve"), "{reason}");
    let (_, _, reason) = store_error(TcpStore::serve("no-such-host.invalid", 0));
    assert!(reason.contains("does not resolve"), "{reason}");
    let (_, _, reason) = store_error(TcpStore::serve("192.0.2.1", 0));
    assert!(reason.contains("not an address of this machine"), "{reason}");
}

#[test]
fn a_server_that_is_not_there_is_waited_for_and_then_an_error() {
    let port = crate::launch::free_port().unwrap();
    let (op, _, reason) = store_error(TcpStore::connect("127.0.0.1", port, SOON));
    assert_eq!(op, "connect");
    assert!(reason.contains("nothing answered"), "{reason}");
    thread::scope(|scope| {
        let client = scope.spawn(|| TcpStore::connect("127.0.0.1", port, LONG).unwrap());
        thread::sleep(Duration::from_millis(100));
        let server = TcpStore::serve("127.0.0.1", port).unwrap();
        client.join().unwrap().set("k", b"v").unwrap();
        assert_eq!(server.get("k").unwrap(), b"v");
    });
}

#[test]
fn something_else_on_the_port_is_an_error_and_not_a_wait() {
    for answer in [&b"HTTP/1.1 400 Bad Request\r\n\r\n"[..], b""] {
        let other = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = other.local_addr().unwrap().port();
        thread::spawn(move || {
            for stream in other.incoming() {
                let mut stream = stream.unwrap();
                let _ = stream.read(&mut [0; 64]);
                let _ = stream.write_all(answer);
            }
        });
        let (_, _, reason) = store_error(TcpStore::connect("127.0.0.1", port, Duration::from_secs(1000)));
        assert!(reason.contains("not a store"), "{reason}");
    }
}

#[test]
fn the_wire_counts_those_that_joined_as_pytorch_joins() {
    let server = TcpStore::serve("127.0.0.1", 0).unwrap();
    assert_eq!(server.wire().unwrap().workers().unwrap(), 0);
    let client = TcpStore::connect("127.0.0.1", server.port(), LONG).unwrap();
    assert_eq!(client.wire().unwrap().join().unwrap(), 1);
    assert_eq!(server.wire().unwrap().join().unwrap(), 2);
    assert_eq!(server.wire().unwrap().workers().unwrap(), 2);
    assert_eq!(server.num_keys().unwrap(), 0);
}

#[test]
fn a_server_that_went_away_is_an_error() {
    let server = TcpStore::serve("127.0.0.1", 0).unwrap();
    let client = TcpStore::connect("127.0.0.1", server.port(), LONG).unwrap();
    client.set_timeout(Duration::from_secs(1));
    client.set("k", b"v").unwrap();
    drop(server);
    let (op, _, _) = store_error(client.add("n", 1));
    assert_eq!(op, "add");
}

#[test]
fn a_file_that_cannot_be_made_is_an_error_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let (op, key, _) = store_error(FileStore::new(dir.path().join("no/such/directory")));
    assert_eq!(op, "open");
    assert!(key.ends_with("no/such/directory"), "{key}");
    store_error(FileStore::new(dir.path()));
}

#[test]
fn the_last_of_its_workers_removes_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let first = FileStore::with_workers(&path, Some(2)).unwrap();
    let second = FileStore::with_workers(&path, Some(2)).unwrap();
    drop(first);
    assert!(path.exists());
    drop(second);
    assert!(!path.exists());
}

#[test]
fn what_a_tcp_stores_server_does_not_take_is_refused_and_the_store_goes_on() {
    let server = TcpStore::serve("127.0.0.1", 0).unwrap();
    let client = TcpStore::connect("127.0.0.1", server.port(), LONG).unwrap();
    let (long_key, too_long_key) = ("k".repeat(8191), "k".repeat(8192));
    let (long, too_long) = (vec![7; 8 << 20], vec![7; (8 << 20) + 1]);
    client.set(&long_key, &long).unwrap();
    assert!(server.get(&long_key).unwrap() == long);
    assert!(client.compare_set(&long_key, &long, b"swapped").unwrap() == b"swapped");
    for refused in [
        client.set("value", &too_long),
        client.append("value", &too_long),
        client.compare_set("value", &too_long, b"").map(drop),
        client.compare_set("value", b"", &too_long).map(drop),
        client.set(&too_long_key, b""),
        client.append(&too_long_key, b""),
        client.get(&too_long_key).map(drop),
        client.add(&too_long_key, 1).map(drop),
        client.check(&["value", &too_long_key]).map(drop),
        client.wait(&[&too_long_key], SOON),
        client.delete(&too_long_key).map(drop),
    ] {
        let error = refused.unwrap_err().to_string();
        assert!(error.contains("PyTorch's server takes") && error.len() < 200, "{error}");
    }
    client.append("value", &long).unwrap();
    assert!(!client.check(&["other"]).unwrap());
    assert_eq!(client.get("value").unwrap().len(), long.len());
}
