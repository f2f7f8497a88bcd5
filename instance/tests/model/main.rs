//! A volume against an array of bytes: random writes, write-zeroes, discards, flushes, several at a time, by the block device and by
//! NBD, with engines and replicas that are killed, detached and attached again, over images of every form and length.
//!
//! Real replica processes with `qemu-storage-daemon`, a real holder and engine. At the end every current replica, read by
//! `qemu-img`, is the array.
//!
//! A failure names the seed and the shape; `MODEL_SEED` and `MODEL_SHAPE` repeat the random choices (not the moments when something is killed).
//! `MODEL_ROUNDS` asks for more than one round over the shapes.

mod array;
#[path = "../../../runtime/tests/authority/mod.rs"]
mod authority;
mod clients;
#[path = "../engine_role/mod.rs"]
mod engine_role;
mod nbd;
mod run;
mod steps;
mod world;

use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use runtime::transport::{Identity, PEER_NAME, Security};

use world::{Form, Length, Shape};

/// Not a test: what the holder and engine processes of the tests run.
#[test]
#[ignore = "a role for the processes that the tests start"]
fn role_process() {
    engine_role::run();
}

fn number(name: &str) -> Option<u64> {
    Some(std::env::var(name).ok()?.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

fn seed_of_now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_micros() as u64
}

/// Each form of image in each length, with one and three replicas in turn, and with TLS between them in every other pair of shapes.
fn shapes(seed: u64) -> Vec<Shape> {
    let forms = [Form::Raw, Form::Qcow2, Form::Zlib, Form::Zstd];
    let lengths = [Length::Shorter, Length::Equal, Length::Longer];
    let images = forms.iter().flat_map(|form| lengths.iter().map(|length| Some((*form, *length))));
    let replicas = |index: u64| if (index + seed).is_multiple_of(2) { 1 } else { 3 };
    let tls = |index: u64| ((index + seed) / 2).is_multiple_of(2);
    // The order of lengths is odd, so that neighbors differ in both.
    std::iter::once(None)
        .chain(images)
        .zip(0..)
        .map(|(image, index)| Shape { image, replicas: replicas(index), tls: tls(index) })
        .collect()
}

#[test]
fn random_requests_leave_what_an_array_of_bytes_has() {
    let first = number("MODEL_SEED").unwrap_or_else(seed_of_now);
    for seed in first..first + number("MODEL_ROUNDS").unwrap_or(1) {
        let wanted = |index: &usize| number("MODEL_SHAPE").is_none_or(|shape| shape == *index as u64);
        for (index, shape) in shapes(seed).into_iter().enumerate().filter(|(index, _)| wanted(index)) {
            let config = Config { cases: 1, max_shrink_iters: 30, failure_persistence: None, ..Config::default() };
            let mut bytes = [0; 32];
            bytes[..8].copy_from_slice(&seed.to_le_bytes());
            bytes[8] = index as u8;
            let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
            let result = runner.run(&steps::strategy(), |story| {
                run::run(&shape, &story);
                Ok(())
            });
            if let Err(error) = result {
                panic!("MODEL_SEED={seed} MODEL_SHAPE={index}, {shape:?}: {error}");
            }
        }
    }
}

/// The daemon of a replica process that was killed ends with its next request; an idle volume has none.
#[test]
fn an_idle_volume_notices_that_the_process_of_a_replica_died() {
    for (number, tls) in [(0, false), (1, false), (1, true)] {
        let mut world = world::World::new(&Shape { image: None, replicas: 3, tls }, 1);
        world.attach();
        let _frozen = world.freeze_daemon(number);
        world.kill_replica(number);
        world.wait_dropped(number);
        world.wait_generation(2);
        assert_eq!(world.status().faulted, None);
        world.detach();
    }
}
