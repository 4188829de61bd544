//! What the tests stand on: real PostgreSQL servers, the built program, and processes that never outlive a test.
//!
//! Owns: starting, driving, crashing and removing them. Does not own: any expectation about Seawall.
#![allow(dead_code)] // each test module uses its own part of the support

pub mod agent;
pub mod archived;
pub mod http;
pub mod model;
pub mod model_clock;
pub mod postgres;
pub mod process;
pub mod restored;
pub mod rig;
pub mod s3;
mod s3_http;
mod s3_memory;
pub mod s3_rig;
mod s3_rule;
pub mod s3_stores;

/// One test per PostgreSQL major from one function taking the major; those not installed here say so and pass.
///
/// `on_every_major!(starts_and_stops);` makes `starts_and_stops::pg13` to `starts_and_stops::pg18`.
macro_rules! on_every_major {
    ($test:ident) => {
        mod $test {
            $crate::support::on_every_major!(@one $test, pg13, 13);
            $crate::support::on_every_major!(@one $test, pg14, 14);
            $crate::support::on_every_major!(@one $test, pg15, 15);
            $crate::support::on_every_major!(@one $test, pg16, 16);
            $crate::support::on_every_major!(@one $test, pg17, 17);
            $crate::support::on_every_major!(@one $test, pg18, 18);
        }
    };
    (@one $test:ident, $name:ident, $major:literal) => {
        #[test]
        fn $name() {
            if $crate::support::postgres::is_installed($major) {
                super::$test($major);
            }
        }
    };
}
pub(crate) use on_every_major;
