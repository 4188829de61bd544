#[derive(Debug)]
pub struct LocalBackend {}
