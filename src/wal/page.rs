pub const PAGE_BYTES: usize = 8192;
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageMagic(pub u16);
