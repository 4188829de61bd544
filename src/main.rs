//! The command `seawall`: everything it does is in `cli`.

fn main() -> std::process::ExitCode {
    seawall::cli::main(std::env::args_os().collect())
}
